"""What all HTML pages share: templates, style, scripts, and the libraries that travel with them."""
