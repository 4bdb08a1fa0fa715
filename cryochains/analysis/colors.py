"""One colour a chain, the same in figures, widgets and ChimeraX scripts."""

# Okabe and Ito's colours, told apart by everyone. Chains beyond the last start again at the first.
CHAIN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
