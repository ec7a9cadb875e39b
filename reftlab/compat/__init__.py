"""pyreft's and pyvene's names, each a thin translation to the graph, so that their programs run.

    import reftlab.compat.pyreft as pyreft
    import reftlab.compat.pyvene as pv

Everything below is an `InterventionGraph` and a `BoundModel`; there is no second engine. A model
made here carries its native form: `reft_model.reft` is the bound model, `reft_model.reft.graph` the
graph. Facts about the two libraries (names, formats, what their arguments mean) are from their
sources, pyreft 0.0.1 to 0.1.0 and pyvene 0.1.1 to 0.1.8.

Floors inside this folder, bottom to top: `bases`, `builtin`, `interventions` and `reft_interventions`,
`components`, `config`, `locations`, `translate`, `calls`, `collect`, `foreign_files`, `face`, `model`,
`imports`, `utilities`, `data`, `trainer`, and the two doors `pyvene` and `pyreft`.
"""
