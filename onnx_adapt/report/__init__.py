"""An HTML page about an adapted model: what verification found and what the slots cost.

`overview` collects the data: `costs` counts and times what the slots add, `trace` runs a model
once and counts the operations of each node (`flops`, `attention`, `call`), `surroundings` cuts
out the graph around a slot. `page` renders the data as HTML: `plots` draws the charts,
`drawing` and `layout` the graphs, `numbers` writes figures for people.
"""
