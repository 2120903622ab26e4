//! A card that is not there: the kernels of the engine, compiled for the host.
