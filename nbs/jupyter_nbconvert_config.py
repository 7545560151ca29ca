"""`jupyter nbconvert --config nbs/jupyter_nbconvert_config.py --to html NOTEBOOK` folds what the notebook folds."""

from pathlib import Path

c = get_config()  # noqa: F821, a name that Jupyter gives to this file
c.HTMLExporter.extra_template_basedirs = [
    str(Path(__file__).resolve().parents[1] / "dpt_nb" / "workbench" / "templates")
]
c.HTMLExporter.template_name = "folded"
c.SlidesExporter.template_name = "reveal"  # kinds of HTML that have templates of their own
c.WebPDFExporter.template_name = "webpdf"
