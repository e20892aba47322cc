"""The report: an HTML page, and its Markdown form, from records, plans and stored runs; ``report`` builds it."""
