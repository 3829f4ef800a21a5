"""The report: HTML, Markdown, figures, model cards."""
