"""Reports: tables, comparisons and one self-contained page, made from run directories alone and without torch.

`assemble` turns runs into data, `words` into sentences, and `render` writes the files and the terminal table. The
statistics behind them are in `roundoff.stats`; reading a run directory is in `roundoff.runs`.

Doors: `assemble.build_report`, `contents`, `render` (`write_report`, `terminal_table`), `pair` (`find_arm`,
`make_pair`, `pair_text`), `compare`, `chips`, `import_table` (`read_table`, `imported_table`), `scan_picture`,
`scan_tables`, and for planning `arms`, `assemble.baseline_arm` and `words`.
"""
