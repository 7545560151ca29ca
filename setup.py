"Package metadata, read from settings.ini so that it is written once."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = here / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["dpt_nb", "dpt_nb.*"]),
    package_data={
        settings["lib_name"]: [
            "weights/*/*",
            "workbench/cards/*",
            "workbench/questions/*/*",
            "workbench/scripts/*",
            "workbench/templates/*/*",
        ]
    },
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={
        "book": settings["book_requirements"].split(),
        "dev": settings["dev_requirements"].split(),
        "export": settings["export_requirements"].split(),
        "exr": settings["exr_requirements"].split(),
        "heif": settings["heif_requirements"].split(),
        "int8": settings["int8_requirements"].split(),
        "lora": settings["lora_requirements"].split(),
        "nyu": settings["nyu_requirements"].split(),
        "openvino": settings["openvino_requirements"].split(),
        "page": settings["page_requirements"].split(),
        "shards": settings["shards_requirements"].split(),
        "tensorboard": settings["tensorboard_requirements"].split(),
        "video": settings["video_requirements"].split(),
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
