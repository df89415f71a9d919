"""The explorer: a page that shows how one model denoises its streams, served on the loopback address or from a file."""

from sfd.explorer.compute import Request, Superseded, compute, facts
from sfd.explorer.frames import image_side
from sfd.explorer.page import static_page
from sfd.explorer.server import serve

__all__ = ["Request", "Superseded", "compute", "facts", "image_side", "serve", "static_page"]
