"""From text to batches: tables, converters, packing, record files, and the loader that is a function of the step."""
