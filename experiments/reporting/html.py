"""How every HTML page begins."""

from __future__ import annotations

# How every page begins, up to styles of its own.
PAGE_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1b1b1b;
         background: #fff; margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1120px; }
  h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
  h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
"""
