"""What a person reads of the results: tables, figures, statistics, pages."""
