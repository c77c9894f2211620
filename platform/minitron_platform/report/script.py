"""The script of the report: Vega, Vega-Lite and vega-embed from vl-convert, with the few lines that draw the charts."""

from __future__ import annotations

import base64
import hashlib
import logging
from importlib.metadata import version

from minitron import storage
from minitron.cache import cache_folder
from minitron.errors import StorageError, one_line
from minitron_platform.shipped_files import data_folder

log = logging.getLogger(__name__)


def page_script() -> str:
    """The whole script, as the content of an HTML element. Making it takes seconds, so it is kept in the cache folder."""
    own = (data_folder("dashboards") / "report" / "page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(f"{version('vl-convert-python')}\n{own}".encode()).hexdigest()
    try:
        kept = cache_folder() / f"report-{digest[:16]}.js"
        if not kept.is_file():
            storage.write_bytes(str(kept), _bundled(own).encode(), private=True)
        return kept.read_text(encoding="utf-8")
    except (OSError, StorageError) as error:  # of a home that cannot be written
        log.info("the script of the report is not kept: %s", one_line(error))
        return _bundled(own)


def _bundled(own: str) -> str:
    from vl_convert import javascript_bundle

    script: str = javascript_bundle(own)
    # inside of strings these mean the same, and cannot end the element
    return script.replace("</script", r"<\/script").replace("<!--", r"<\!--").replace("\r", "").strip()


def content_security_policy(script: str) -> str:
    """The policy of the page: no request, no code but `script`."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = {"script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'", "img-src": "data:"}
    rest = {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in {**rest, **allowed}.items())
