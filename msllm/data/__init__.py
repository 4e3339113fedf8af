"""From text to batches: converters, tables, packing, record files, and the loader.

The modules, in the order in which text flows through them (docs/data.md):

- `files`, `sources`, `corpora`: input files to records.
- `converters`: records to tables, one per example.
- `packing`: examples to tables of T rows.
- `records`: packed tables to files, and back.
- `prepare`: runs all of the above (with `build`, `job`, `executors`, `identity`, `report` and
  `duplicates`).
- `loader`, `mixture`: prepared data to batches, as a function of the step.
- `global_batch`: batches to global arrays on the devices of a mesh.

`tables` defines the table of one example, and `dictation` generates examples.
"""
