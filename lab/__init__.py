"""The VM lab: kernels, tools and servers that the tests need and the host lacks, none of it installed on the host."""
