// SPDX-License-Identifier: Apache-2.0
/* The module collector.compiled.loops: its functions are in the other files, its types in loops.pyi. */
#include "loops.h"
#include "names.h"

static int loops_exec(PyObject *Py_UNUSED(module))
{
	/* Python's hashes of bytes are seeded at random in each process (PYTHONHASHSEED). */
	PyObject *text = PyBytes_FromString("device names");
	Py_hash_t seed;

	if (!text)
		return -1;
	seed = PyObject_Hash(text);
	Py_DECREF(text);
	if (seed == -1)
		return -1;
	names_seed((uint64_t)seed);
	return 0;
}

static PyMethodDef loops_methods[] = {
	{ "decode", loops_decode, METH_VARARGS, NULL },
	{ "distinct", loops_distinct, METH_VARARGS, NULL },
	{ "locate", loops_locate, METH_VARARGS, NULL },
	{ 0 },
};

static PyModuleDef_Slot loops_slots[] = {
	{ Py_mod_exec, (void *)loops_exec },
	{ 0 },
};

static struct PyModuleDef loops_module = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "collector.compiled.loops",
	.m_methods = loops_methods,
	.m_slots = loops_slots,
};

PyMODINIT_FUNC PyInit_loops(void);

PyMODINIT_FUNC PyInit_loops(void)
{
	return PyModuleDef_Init(&loops_module);
}
