"""The report of the subspace study: rows, claims, pictures and pages."""
