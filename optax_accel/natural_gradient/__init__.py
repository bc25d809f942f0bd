"""Natural gradient methods: K-FAC and EKFAC on layers found in the program, Hessian-free."""
