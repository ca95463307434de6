"""The data report of preprocess: what was used, what was rejected, what looks wrong; numpy and jinja2.

statistics: the numbers; summary: a few lines for the terminal; page: the HTML page, from page.html.j2.
"""
