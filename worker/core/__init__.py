"""Pure decisions: no clock, no network, no database; every rule here is tested by a table of cases."""
