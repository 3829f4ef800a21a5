"""The machines: Ray, the resources of a trial, exclusive use of a device, health. Knows no models and no searches."""
