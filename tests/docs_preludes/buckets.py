import pytest

import actcache as ac
import docs_bucket

docs_bucket.serve()
