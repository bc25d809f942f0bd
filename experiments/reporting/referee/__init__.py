"""The referee: studies as data, the tests that judge their claims, tables of what they found."""
