"""What the house is kept with: the tangler and its parts, the rendering of chapters, a launcher."""
