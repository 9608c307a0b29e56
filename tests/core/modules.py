"""Modules made of text, for what only source code can say."""

from __future__ import annotations

import textwrap
from types import ModuleType


def a_module(source: str) -> ModuleType:
    module = ModuleType("later_module")
    imports = "from typing import *\nfrom pydantic import BaseModel\nfrom sqlalchemy.ext.asyncio import AsyncSession\n"
    exec(compile(imports + textwrap.dedent(source), "later_module.py", "exec"), module.__dict__)
    return module
