"""Tests of the installed packages in whole machines, and what boots these."""
