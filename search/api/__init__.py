"""What the project does, as functions: `import paretoprune` hands them out, and the commands call them."""
