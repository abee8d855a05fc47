"""Images and the texts that go with them: MVTec-AD folders, stand-ins made from real textures, simulated defects."""
