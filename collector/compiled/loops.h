/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The functions of the module collector.compiled.loops. loops.pyi says what each takes and returns.
 *
 * A function checks what it gets before it releases the GIL, and touches no Python object until it
 * has the GIL again. It writes only into buffers that its caller has allocated.
 */
#ifndef MACE_LOOPS_H
#define MACE_LOOPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* pages.c */
PyObject *loops_decode(PyObject *module, PyObject *args);
PyObject *loops_locate(PyObject *module, PyObject *args);

/* names.c */
PyObject *loops_distinct(PyObject *module, PyObject *args);

#endif
