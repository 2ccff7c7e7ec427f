from rankkernels.ops import din_attention, embedding_bag, fm_interaction
