"""A hook of mkdocs: links from a page to a file outside `docs/` lead to the file in the repository."""

import re


def on_page_markdown(markdown, page, config, files):
    return re.sub(r"\]\(\.\./", f"]({config.repo_url}/blob/main/", markdown)
