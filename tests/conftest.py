"""Before torch is imported: threads that wait sleep, so that the suite does not crawl on a machine with other work."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
