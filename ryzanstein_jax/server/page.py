"""The page at `/`: files of this package, sent as they are. They hold no data, so they are open without a key."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = files("ryzanstein_jax.server") / "static"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
#: By path.
FILES = {"/": "index.html"} | {
    f"/page/{name}": name for name in ("page.css", "page.js", "api.js", "chart.js", "chat.js")
}
#: Nothing of the page may come from elsewhere, go elsewhere, or be put into another page.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def pages() -> list[Route]:
    """A route for each file, read once."""
    return [_route(path, name) for path, name in FILES.items()]


def _route(path: str, name: str) -> Route:
    content, kind = (_FOLDER / name).read_bytes(), _TYPES[name.rpartition(".")[2]]

    async def answer(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return Route(path, answer, methods=["GET"])
