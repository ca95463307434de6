"""Reports as HTML pages, of values that others computed; numpy and jinja2.

The data report of preprocess (what was used, what was rejected, what looks wrong). statistics: the numbers;
summary: a few lines for the terminal; page: the HTML page. The report of a score: score_page.
"""
