/* The part of libcuda.so.1 that exporting memory needs, with two GPUs. */
#include "stub.h"

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201,
       OPERATING_SYSTEM = 304, NOT_FOUND = 500, NOT_SUPPORTED = 801 };

#define GPUS 2
#define TOTAL (1UL << 30)

struct context {
	int device, primary, retained;
};

static struct context primary[GPUS] = { { 0, 1, 0 }, { 1, 1, 0 } };
static struct context user[GPUS] = { { 0, 0, 0 }, { 1, 0, 0 } };
static __thread struct context *stack[16];
static __thread int depth;
static int initialised, pcie;

/* The start of each call that needs cuInit. */
#define BEGIN(call)                                                                                \
	do {                                                                                       \
		int64_t code;                                                                      \
		if (refuses(#call, &code))                                                         \
			return code;                                                               \
		if (!initialised && strcmp(#call, "cuInit"))                                       \
			return NOT_INITIALIZED;                                                    \
	} while (0)
#define NEEDS(call, condition)                                                                     \
	do {                                                                                       \
		if (!(condition) && wrong(#call, #condition))                                      \
			return INVALID_VALUE;                                                      \
	} while (0)
#define CURRENT (depth ? stack[depth - 1] : NULL)

int cuInit(unsigned int flags)
{
	BEGIN(cuInit);
	NEEDS(cuInit, flags == 0);
	initialised = 1;
	return OK;
}

int cuDeviceGetCount(int *count)
{
	BEGIN(cuDeviceGetCount);
	*count = GPUS;
	return OK;
}

int cuDeviceGet(int *device, int ordinal)
{
	BEGIN(cuDeviceGet);
	NEEDS(cuDeviceGet, ordinal >= 0 && ordinal < GPUS);
	*device = 100 + ordinal;
	return OK;
}

int cuDeviceGetPCIBusId(char *text, int length, int device)
{
	BEGIN(cuDeviceGetPCIBusId);
	NEEDS(cuDeviceGetPCIBusId, length >= 13 && device >= 100 && device < 100 + GPUS);
	snprintf(text, length, device == 100 ? "0000:3B:00.0" : "0001:5E:00.0");
	return OK;
}

int cuGetErrorName(int code, const char **name)
{
	switch (code) {
	case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return OK;
	case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return OK;
	case OPERATING_SYSTEM: *name = "CUDA_ERROR_OPERATING_SYSTEM"; return OK;
	case 999: *name = "CUDA_ERROR_UNKNOWN"; return OK;
	}
	*name = NULL;
	return INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(struct context **context, int device)
{
	BEGIN(cuDevicePrimaryCtxRetain);
	NEEDS(cuDevicePrimaryCtxRetain, device >= 100 && device < 100 + GPUS);
	*context = &primary[device - 100];
	(*context)->retained++;
	live++;
	return OK;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
	BEGIN(cuDevicePrimaryCtxRelease);
	NEEDS(cuDevicePrimaryCtxRelease, device >= 100 && device < 100 + GPUS);
	NEEDS(cuDevicePrimaryCtxRelease, primary[device - 100].retained > 0);
	live--;
	if (!--primary[device - 100].retained)
		/* The context's memory is freed with it. */
		for (int i = 0; i < MOST; i++)
			if (all[i].kind != FREE && all[i].owner == &primary[device - 100])
				return wrong("cuDevicePrimaryCtxRelease", "the context still has memory"), OK;
	return OK;
}

int cuCtxPushCurrent_v2(struct context *context)
{
	BEGIN(cuCtxPushCurrent);
	NEEDS(cuCtxPushCurrent, context && depth < 16);
	NEEDS(cuCtxPushCurrent, !context->primary || context->retained);
	stack[depth++] = context;
	live++;
	return OK;
}

int cuCtxPopCurrent_v2(struct context **context)
{
	BEGIN(cuCtxPopCurrent);
	NEEDS(cuCtxPopCurrent, depth > 0 && context);
	*context = stack[--depth];
	live--;
	return OK;
}

int cuCtxSynchronize(void)
{
	BEGIN(cuCtxSynchronize);
	return CURRENT ? OK : INVALID_CONTEXT;
}

static uintptr_t used(int device)
{
	uintptr_t sum = 0;

	for (int i = 0; i < MOST; i++)
		if (all[i].kind != FREE && all[i].device == device)
			sum += all[i].size;
	return sum;
}

int cuMemGetInfo_v2(size_t *available, size_t *total)
{
	BEGIN(cuMemGetInfo);
	if (!CURRENT)
		return INVALID_CONTEXT;
	*total = TOTAL;
	*available = TOTAL - used(CURRENT->device);
	return OK;
}

/* As in the driver, small allocations share a block of 2 MiB and are aligned to 512 bytes. */
int cuMemAlloc_v2(uintptr_t *address, size_t size)
{
	struct memory *new, *other = NULL;
	uintptr_t at;

	BEGIN(cuMemAlloc);
	NEEDS(cuMemAlloc, address && size);
	if (!CURRENT)
		return INVALID_CONTEXT;
	if (size > TOTAL - used(CURRENT->device))
		return OUT_OF_MEMORY;
	if (!(new = make(DEVICE, size < BLOCK ? BLOCK : size, CURRENT, CURRENT->device)))
		return OUT_OF_MEMORY;
	if (size < BLOCK) {
		for (int i = 0; i < MOST; i++)
			if (all[i].kind == DEVICE && all[i].shared && all[i].owner == CURRENT && !other)
				other = &all[i];
		at = other ? other->block : new->block;
		if (other) {
			uint64_t id = new->id;

			release(new);
			live++;
			*new = *other;
			new->id = id;
			for (int i = 0; i < MOST; i++)
				if (all[i].kind != FREE && all[i].memfd == other->memfd && &all[i] != new &&
				    all[i].base + all[i].size > at)
					at = round_up(all[i].base + all[i].size, 512);
			if (at + size > new->block + BLOCK)
				return wrong("cuMemAlloc", "the stub's block is full"), OUT_OF_MEMORY;
		}
		new->shared = 1;
		new->base = new->range = at;
		new->size = new->range_size = size;
	}
	*address = new->base;
	return OK;
}

int cuMemFree_v2(uintptr_t address)
{
	struct memory *memory = find(address);

	BEGIN(cuMemFree);
	NEEDS(cuMemFree, memory && memory->base == address);
	if (!CURRENT)
		return INVALID_CONTEXT;
	release(memory);
	return OK;
}

int cuMemsetD32_v2(uintptr_t address, unsigned int word, size_t count)
{
	struct memory *memory = find(address);

	BEGIN(cuMemsetD32);
	NEEDS(cuMemsetD32, memory && address % 4 == 0 && address + 4 * count <= memory->base + memory->size);
	if (CURRENT != memory->owner)
		return INVALID_CONTEXT;
	for (size_t i = 0; i < count; i++)
		((volatile unsigned int *)address)[i] = word;
	return OK;
}

int cuPointerGetAttributes(unsigned int count, const int *names, void *const *places, uintptr_t address)
{
	const struct memory *memory = find(address);

	BEGIN(cuPointerGetAttributes);
	NEEDS(cuPointerGetAttributes, count && names && places);
	for (unsigned int i = 0; i < count; i++)
		switch (names[i]) {
		case 1: *(void **)places[i] = memory ? memory->owner : NULL; break;
		case 2: *(unsigned int *)places[i] = !memory ? 0 : memory->kind == HOST ? 1 : 2; break;
		case 7: *(uint64_t *)places[i] = memory ? memory->id : 0; break;
		case 8: *(unsigned int *)places[i] = memory && memory->kind == MANAGED; break;
		case 9: *(int *)places[i] = memory ? memory->device : -2; break;
		case 11: *(uintptr_t *)places[i] = memory ? memory->range : 0; break;
		case 12: *(size_t *)places[i] = memory ? memory->range_size : 0; break;
		default: return wrong("cuPointerGetAttributes", "unknown attribute"), INVALID_VALUE;
		}
	return OK;
}

int cuMemGetAddressRange_v2(uintptr_t *base, size_t *size, uintptr_t address)
{
	const struct memory *memory = find(address);

	BEGIN(cuMemGetAddressRange);
	if (!CURRENT)
		return INVALID_CONTEXT;
	if (!memory)
		return NOT_FOUND;
	*base = memory->base;
	*size = memory->size;
	return OK;
}

#ifndef OLD
int cuMemGetHandleForAddressRange(void *handle, uintptr_t address, size_t size, int type,
				  unsigned long long flags)
{
	struct memory *memory = NULL;
	int fd;

	BEGIN(cuMemGetHandleForAddressRange);
	NEEDS(cuMemGetHandleForAddressRange, handle && type == 1 && flags <= 1);
	NEEDS(cuMemGetHandleForAddressRange, size && address % PAGE == 0 && size % PAGE == 0);
	/* The range may begin in the block before a small allocation. */
	for (int i = 0; i < MOST; i++)
		if (all[i].kind == DEVICE && address - all[i].block < all[i].block_size)
			memory = &all[i];
	NEEDS(cuMemGetHandleForAddressRange,
	      memory && address + size <= memory->block + round_up(memory->block_size, PAGE));
	if (!CURRENT || (memory->owner ? CURRENT != memory->owner : CURRENT->device != memory->device))
		return INVALID_CONTEXT;
	if (flags && !pcie)
		return NOT_SUPPORTED;
	fd = bare ? -1 : dmabuf(memory, address, size, UDMABUF_FLAGS_CLOEXEC);
	if (fd < 0 && !bare)
		return OPERATING_SYSTEM;
	*(int *)handle = fd;
	return OK;
}
#endif

/* For the test: sets whether the GPU supports the PCIe mapping. */
void stub_pcie(int yes)
{
	pcie = yes;
}

/* For the test: a context of the application. */
void *stub_context(int device)
{
	initialised = 1;
	return &user[device];
}

/* For the test: `count` allocations of `size` bytes, mapped back to back into a reservation with a hole after
 * them, as by cuMemCreate and cuMemMap. */
uintptr_t stub_map(int count, size_t size, int device)
{
	uintptr_t base = reserve((count + 1) * size);

	for (int i = 0; i < count; i++) {
		struct memory *new = make(DEVICE, size, NULL, device);

		/* Move the memory to its place in the reservation. */
		munmap((void *)new->base, size);
		close(new->memfd);
		new->base = new->block = base + i * size;
		new->memfd = back(new->base, size);
		new->range = base;
		new->range_size = (count + 1) * size;
	}
	return base;
}

void stub_unmap(uintptr_t base)
{
	struct memory *memory;

	while ((memory = find(base))) {
		base += memory->size;
		release(memory);
	}
}

/* For the test: cuMemAllocManaged and cuMemAllocHost. */
uintptr_t stub_other(int managed, size_t size)
{
	return make(managed ? MANAGED : HOST, size, &user[0], 0)->base;
}
