"""Engines: what runs one compiled component. All kinds share the protocol in `ldmrt.engines.protocol`."""
