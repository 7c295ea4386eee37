"""The demo: the whole path of a lineage on text that every machine has."""
