"""HTML as text: every word that comes from a run is escaped here."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

_SIDE = 160  # pixels; pictures are shown no larger
_QUALITY = 90


class Markup(str):
    """Text that is HTML already."""


def escaped(content: object) -> str:
    """HTML of anything: markup as it is, all else as plain text."""
    return content if isinstance(content, Markup) else html.escape(str(content))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """``<name attributes>content</name>``; ``class_`` is class, and _ in a name is -."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    inside = "".join(f' {key}="{html.escape(str(v))}"' for key, v in given.items() if v != "")
    return Markup(f"<{name}{inside}>{''.join(map(escaped, content))}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Markup and text in a row."""
    return Markup("".join(map(escaped, parts)))


def missing(reason: object) -> Markup:
    """The one line that says why something is not shown."""
    return tag("p", " ".join(str(reason).split()), class_="missing")


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], class_: str = "") -> Markup:
    """A table that scrolls on narrow screens; the first cell of each row is its head."""
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in heads)))
    body = tag(
        "tbody",
        *(
            tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest))
            for first, *rest in rows
        ),
    )
    whole = tag("table", head if any(heads) else "", body, class_=class_)
    # It can be reached, and so scrolled, by the keyboard.
    return tag("div", whole, class_="scroll", tabindex="0")


def picture(pixels: np.ndarray, alt: str, is_map: bool = False, class_: str = "") -> Markup:
    """uint8 [h, w, 3] as an image inside the page. ``is_map``: a pixel is a cell, kept exactly."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kind = "png" if is_map else "jpeg"
    buffer = io.BytesIO()
    options = {"optimize": True} if is_map else {"quality": _QUALITY, "subsampling": 0}
    image.save(buffer, kind, **options)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size = {"width": image.width, "height": image.height}
    shown = " ".join(filter(None, ("map" if is_map else "", class_)))
    opening = tag("img", src=source, alt=alt, title=alt, **size, class_=shown)
    return Markup(opening.removesuffix("</img>"))
