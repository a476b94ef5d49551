"""Sphinx settings of the book.

``conf.py`` lies at the root of the project because the book includes the project: the directives of
``tools/sphinx_tangle.py`` render the canonical blocks of the chapters, and those of ``tools/sphinx_api.py`` the
reference of the package that is tangled from them.  ``include_patterns`` keeps Sphinx from reading its own output as source.
"""

import atexit
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import jupyter_client
import jupyter_client.provisioning

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "providers" / "pfft-python")]
# The cells of the chapters must see this tree's package, wherever the build was started.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

project = "vmad_lit"
author = "the vmad_lit authors"
copyright = "the vmad_lit authors"

from tools.sphinx_api import linkcode_resolve  # noqa: E402, F401  ([source] leads to the chapter)
from tools.sphinx_tangle import book  # noqa: E402
from vmad_lit import __version__ as version  # noqa: E402

release = version

extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "tools.sphinx_tangle",
    "tools.sphinx_cells",
    "tools.sphinx_pictures",
    "tools.sphinx_subjects",
    "tools.sphinx_epub",
    "tools.sphinx_api",
    "tools.gallery",
]

root_doc = "book/index"
include_patterns = ["book/**"]
api_page = "book/chapters/901-api"  # lists what the reference shows first
toc_object_entries_show_parents = "hide"
nitpicky = True
suppress_warnings = ["toc.not_readable"]  # while chapters are being written
# Whether a picture without alternative text or caption fails the build.
pictures_need_words = True

# -- Markdown ---------------------------------------------------------------------------------------------

myst_enable_extensions = [
    "amsmath",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "fieldlist",
    "smartquotes",
    "tasklist",
]
myst_heading_anchors = 3
myst_dmath_double_inline = True
bibtex_bibfiles = ["book/references.bib"]
bibtex_default_style = "alpha"
bibtex_reference_style = "author_year"
numfig = True
math_eqref_format = "({number})"

# -- Executed cells ---------------------------------------------------------------------------------------


def package_digest() -> str:
    """A name for the state of everything that a cell may import."""
    digest = hashlib.sha256()
    tools = [  # that a cell may import
        path
        for path in sorted((ROOT / "tools").rglob("*.py"))
        if not path.name.startswith(
            ("sphinx_", "reference", "check_book", "browser", "print_book", "gallery")
        )
    ]
    package = sorted(ROOT / file for file in book().files.values())
    benchmarks = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("results/*.json")]
    for path in [*package, *tools, *sorted(benchmarks)]:
        text = path.read_bytes() if path.exists() else b""
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + text + b"\0")
    return digest.hexdigest()[:16]


_caches = ROOT / "_build" / "cells"
nb_execution_mode = "cache"
nb_execution_cache_path = str(_caches / package_digest())
nb_execution_timeout = 300
nb_execution_in_temp = True
# A failing cell is a warning: the build goes on, tells all failures, and then fails (-W).
nb_execution_raise_on_error = False
nb_execution_show_tb = True
nb_merge_streams = True
nb_number_source_lines = False
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

# Kernels talk through sockets in a folder of ours: a TCP port that is free now may be taken when the kernel starts.
_sockets = tempfile.mkdtemp(prefix="book-")
atexit.register(shutil.rmtree, _sockets, ignore_errors=True)


class SocketKernelManager(jupyter_client.AsyncKernelManager):
    """A kernel manager that hands out sockets, where there are any and their path is not too long.

    Its kernels know on which lines of a chapter their cells stand.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        if os.name == "posix" and len(_sockets) < 60:
            self.transport = "ipc"
            self.ip = f"{_sockets}/{uuid.uuid4().hex}"

    def format_kernel_cmd(self, extra_arguments=None):
        return super().format_kernel_cmd([*(extra_arguments or []), "--ext=tools.cells"])


jupyter_client.AsyncKernelManager = SocketKernelManager  # where nbclient looks for it
if hasattr(os, "fork"):  # kernels that need not import what others have imported
    _provisioners = jupyter_client.provisioning.KernelProvisionerFactory.instance()
    _nursling = importlib.metadata.EntryPoint("nursling", "tools.kernels:Nursling", _provisioners.GROUP_NAME)
    _provisioners.provisioners[_nursling.name] = _nursling
    _provisioners.default_provisioner_name = _nursling.name

for _old in _caches.glob("*"):  # results of other states of the package are of no use
    if _old.name != Path(nb_execution_cache_path).name:
        shutil.rmtree(_old, ignore_errors=True)

# -- The page ---------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "vmad_lit"
html_static_path = ["book/_static"]
html_css_files = ["book.css"]
html_copy_source = True
html_show_copyright = False
html_theme_options = {
    "show_navbar_depth": 1,
    "collapse_navbar": True,  # the modules of the reference are listed on the pages of the reference alone
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # one search field is enough
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "github-dark",
}
html_last_updated_fmt = None
copybutton_prompt_text = r">>> |\.\.\. |\$ |In \[\d*\]: "
copybutton_prompt_is_regexp = True

# Mathematics is typeset by MathJax from the book's own folder, so that it also reads without a network.
# The package sphinx-mathjax-offline carries the library; one script and one set of fonts of it are enough.
html_math_renderer = "mathjax"
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
if _mathjax and _mathjax.submodule_search_locations:
    html_static_path.append(str(Path(next(iter(_mathjax.submodule_search_locations))) / "static"))
    mathjax_path = "mathjax/tex-chtml.js"
    mathjax3_config = {
        "tex": {"macros": {"dd": r"\mathrm{d}", "Re": r"\operatorname{Re}"}},
        "options": {"enableMenu": False},
    }
exclude_patterns = [
    "mathjax/sre/**",
    "mathjax/a11y/**",
    "mathjax/adaptors/**",
    "mathjax/ui/**",
    "mathjax/output/svg/**",
    "mathjax/input/mml/**",
    "mathjax/input/asciimath*",
    "mathjax/output/svg*",
    "mathjax/*-full*",
    "mathjax/mml-*",
    "mathjax/tex-mml-*",
    "mathjax/tex-svg*",
    "mathjax/node-main*",
]

# -- The EPUB (sphinx-build -b epub -t epub) ----------------------------------------------------------------

epub_title = "vmad_lit: from a symbol to a reconstructed universe"
epub_basename = "vmad_lit"
epub_description = "A book that is a program: automatic differentiation of scientific models, on many ranks"
epub_show_urls = "no"
epub_tocdepth = 2
epub_tocscope = "includehidden"  # as the tables of contents on the first page are
epub_css_files = ["epub.css"]
epub_exclude_files = ["search.html", "_static/opensearch.xml", ".nojekyll"]
if tags.has("epub"):  # noqa: F821  (of Sphinx)
    html_math_renderer = "mathml"
    html_static_path = ["book/_static"]
    html_css_files = []
    html_copy_source = False
