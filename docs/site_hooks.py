"""Hooks of MkDocs: the site has the folders of the repository, so that every link leads where it leads there."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# What the pages link to beside each other.
BESIDE = ("*.md", "LICENSE", "action.yml", "examples/*.py")
FOLDERS = sorted(path.parent.name for path in (ROOT / "knormpress").glob("*/__init__.py"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Order the pages as the README's list of pages does."""
    pages = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Pages\n")[2]
    reference = [{name: f"reference/{name}.md"} for name in ("knormpress", *FOLDERS)]
    config.nav = ["README.md", *re.findall(r"\]\(([^)]+\.md)\)", pages), {"Reference": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Move the pages to where they stand in the repository, and add the README, its neighbours and the reference."""
    for page in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(page)
    patterns = (*BESIDE, "docs/*.md", "docs/*.css", "docs/images/*")
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        files.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "reference/knormpress.md", content="::: knormpress\n"))
    for name in FOLDERS:
        shown = f"::: knormpress.{name}\n    options:\n      show_submodules: true\n"
        files.append(File.generated(config, f"reference/{name}.md", content=shown))
    return files
