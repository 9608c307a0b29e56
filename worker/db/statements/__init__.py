"""The statements of the moves, built once; `worker.db.transitions` sends them.

Each locks its rows before it updates them. None of more than one row waits for a lock, so none can deadlock: what
another transaction holds is passed by.

The states they look for are constants of the text: see `worker.db.models.constant`.
"""
