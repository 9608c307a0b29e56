"""Who is blamed when a worker dies: every job that ran there, for nobody knows which of them it was.

From its second crash on a job is a suspect, and a process runs one suspect at a time: so the last crashes of a poison
job are its own, and its neighbours', who were with it by chance, stop there. After a first crash all run again at once:
a worker that was killed from outside must not make its jobs wait for one another.
"""

from __future__ import annotations

from typing import Final

SUSPECT_FROM: Final = 2
"""So many crashes make a suspect."""
