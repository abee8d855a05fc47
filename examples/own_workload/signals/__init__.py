"""A workload of your own: what kind of wave is this? Its files are explained in the README beside this folder."""
