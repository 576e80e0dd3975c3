"""The network as a dynamical system: exponents, spectra, fixed points."""
