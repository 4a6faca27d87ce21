"""A hook of mkdocs: the files of the repository that pages link to are part of the site.

A page links to `../tests/test_cli.py`, which a checkout has there. So the file takes part in the build under that very
path, relative to docs/, and mkdocs finds the link, checks it and writes its address as of any other.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

_LINK = re.compile(r"\]\((?!\w+:)([^)\s#]+)")
_LINK_INTO_DOCS = re.compile(r"\]\((?:\.\./)*docs/")
# What a browser shows by its suffix; other files get ".txt".
_SHOWN = {".json", ".png"}


def on_files(files: Files, *, config: Any) -> Files:
    """Add what pages link to outside of docs/, and what those pages link to."""
    docs = Path(config.docs_dir)
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for link in _LINK.findall(page.content_string):
            uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.src_uri), link))
            is_outside = uri.startswith("../") and not uri.startswith(("../../", f"../{docs.name}/"))
            if is_outside and uri not in files.src_uris and (docs / uri).is_file():
                file = _repository_file(uri, config)
                files.append(file)
                if file.is_documentation_page():
                    pages.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links from the repository's pages into docs/ start at the site's root."""
    return _LINK_INTO_DOCS.sub("](/", markdown) if page.file.src_uri.startswith("../") else markdown


def _repository_file(uri: str, config: Any) -> File:
    path = Path(uri.removeprefix("../"))
    if path.suffix == ".md":
        # The page of docs/ has the name index.html already.
        address = path.with_name("readme.html" if path.name == "README.md" else f"{path.stem.lower()}.html")
    else:
        address = path if path.suffix in _SHOWN else path.with_name(f"{path.name}.txt")
    return File(
        uri,
        config.docs_dir,
        config.site_dir,
        config.use_directory_urls,
        dest_uri=address.as_posix(),
        # Stated, since by default mkdocs leaves out all paths with a leading dot.
        inclusion=InclusionLevel.NOT_IN_NAV,
    )
