/* link.cdef.h for C: cffi reads that file as it is, so its guard has to stand here. */
#pragma once

#include <stdint.h>

#include "link.cdef.h"
