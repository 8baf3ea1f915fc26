/* The part of libcuda.so.1 that exporting memory needs, with two GPUs. */
#include "stub.h"

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_CONTEXT = 201,
       CONTEXT_IS_DESTROYED = 709, OPERATING_SYSTEM = 304, NOT_FOUND = 500, NOT_SUPPORTED = 801 };

#define GPUS 2
#define TOTAL (1UL << 30)

struct context {
	int device, primary, retained;
	/* CU_CTX_SCHED_BLOCKING_SYNC and CU_CTX_MAP_HOST, which must stay set. */
	unsigned int flags;
	int destroyed;
};

#define FLAGS 0xc
#define SYNC_MEMOPS 0x80

static struct context primary[GPUS] = { { 0, 1, 0, FLAGS, 0 }, { 1, 1, 0, FLAGS, 0 } };
static struct context user[GPUS] = { { 0, 0, 0, FLAGS, 0 }, { 1, 0, 0, FLAGS, 0 } };

/* Physical memory of cuMemCreate. A handle is its index from 1, and the next memory gets the handle of memory that is
 * gone, as a driver may do. */
struct physical {
	int memfd, device, capable, references;
	uintptr_t size;
};

static struct physical physical[MOST];
static __thread struct context *stack[16];
static __thread int depth;
static int initialised, pcie, mig, spans = 1, flushing, pool_exports, synced;
static uintptr_t window;

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
	const char *visible = getenv("CUDA_VISIBLE_DEVICES");

	BEGIN(cuInit);
	NEEDS(cuInit, flags == 0);
	if (visible && (!*visible || *visible == '-'))
		return NO_DEVICE;
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
	snprintf(text, length, device == 100 || mig ? "0000:3B:00.0" : "0001:5E:00.0");
	return OK;
}

int cuDriverGetVersion(int *version)
{
	*version = 12080;
	return OK;
}

int cuDeviceGetName(char *name, int length, int device)
{
	BEGIN(cuDeviceGetName);
	NEEDS(cuDeviceGetName, length > 0 && device >= 100 && device < 100 + GPUS);
	snprintf(name, length, "Stub GPU %d", device - 100);
	return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
	BEGIN(cuDeviceGetAttribute);
	NEEDS(cuDeviceGetAttribute, value && device >= 100 && device < 100 + GPUS);
	switch (attribute) {
	case 110: case 116: case 124: *value = 1; return OK;
	case 117: *value = flushing; return OK;
	case 118: *value = 100; return OK;
	}
	return wrong("cuDeviceGetAttribute", "unknown attribute"), INVALID_VALUE;
}

int cuGetErrorName(int code, const char **name)
{
	switch (code) {
	case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return OK;
	case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return OK;
	case CONTEXT_IS_DESTROYED: *name = "CUDA_ERROR_CONTEXT_IS_DESTROYED"; return OK;
	case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; return OK;
	case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return OK;
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
	if (context->destroyed)
		return CONTEXT_IS_DESTROYED;
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

int cuCtxGetFlags(unsigned int *flags)
{
	BEGIN(cuCtxGetFlags);
	if (!CURRENT)
		return INVALID_CONTEXT;
	*flags = CURRENT->flags;
	return OK;
}

int cuCtxSetFlags(unsigned int flags)
{
	BEGIN(cuCtxSetFlags);
	if (!CURRENT)
		return INVALID_CONTEXT;
	NEEDS(cuCtxSetFlags, (flags & CURRENT->flags) == CURRENT->flags);
	CURRENT->flags = flags;
	return OK;
}

int cuFlushGPUDirectRDMAWrites(int target, int scope)
{
	BEGIN(cuFlushGPUDirectRDMAWrites);
	NEEDS(cuFlushGPUDirectRDMAWrites, target == 0 && (scope == 100 || scope == 200) && (flushing & 1));
	if (!CURRENT)
		return INVALID_CONTEXT;
	flushes++;
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

int cuMemcpyHtoD_v2(uintptr_t to, const void *from, size_t count)
{
	struct memory *memory = find(to);

	BEGIN(cuMemcpyHtoD);
	NEEDS(cuMemcpyHtoD, memory && from && to + count <= memory->base + memory->size);
	memcpy((void *)to, from, count);
	return OK;
}

int cuMemcpyDtoH_v2(void *to, uintptr_t from, size_t count)
{
	struct memory *memory = find(from);

	BEGIN(cuMemcpyDtoH);
	NEEDS(cuMemcpyDtoH, memory && to && from + count <= memory->base + memory->size);
	memcpy(to, (const void *)from, count);
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
	uintptr_t base = memory ? memory->range : 0, size = memory ? memory->range_size : 0;
	int without_context = memory && (memory->physical || memory->kind == POOL);

	BEGIN(cuPointerGetAttributes);
	NEEDS(cuPointerGetAttributes, count && names && places);
	lookups++;
	if (nonsense == SIZE_ZERO)
		size = 0;
	if (nonsense == BASE_ABOVE)
		base = address + PAGE;
	for (unsigned int i = 0; i < count; i++)
		switch (names[i]) {
		case 1: *(void **)places[i] = memory && !without_context ? memory->owner : NULL; break;
		case 2: *(unsigned int *)places[i] = !memory ? 0 : memory->kind == HOST ? 1 : 2; break;
		case 7: *(uint64_t *)places[i] = memory ? memory->id : 0; break;
		case 8: *(unsigned int *)places[i] = memory && memory->kind == MANAGED; break;
		case 9: *(int *)places[i] = memory ? memory->device : -2; break;
		case 11: *(uintptr_t *)places[i] = base; break;
		case 12: *(size_t *)places[i] = size; break;
		case 17: *(void **)places[i] = memory && memory->kind == POOL ? &primary : NULL; break;
		default: return wrong("cuPointerGetAttributes", "unknown attribute"), INVALID_VALUE;
		}
	return OK;
}

/* SYNC_MEMOPS, which the driver does not set for memory of no context. */
int cuPointerSetAttribute(const void *value, int name, uintptr_t address)
{
	const struct memory *memory = find(address);

	BEGIN(cuPointerSetAttribute);
	NEEDS(cuPointerSetAttribute, name == 6 && *(const unsigned int *)value == 1 && memory);
	if (memory->physical || memory->kind == POOL)
		return NOT_SUPPORTED;
	synced++;
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
	*base = memory->base + (nonsense == RANGE_ELSEWHERE ? 16 * BLOCK : 0);
	*size = memory->size;
	return OK;
}

#include "cuda_mapped.h"

#ifndef OLD
/* A dma-buf across mappings, or INVALID_VALUE if they have a gap. */
static int across(uintptr_t address, uintptr_t size, int *code)
{
	static struct {
		struct udmabuf_create_list head;
		struct udmabuf_create_item items[MOST];
	} list;
	uintptr_t at = address, end = address + size;
	int count = 0, device = find(address)->device;

	while (at < end) {
		const struct memory *memory = find(at);
		uintptr_t until;

		*code = INVALID_VALUE;
		if (!memory || !memory->physical || count == MOST || (count && !spans))
			return -1;
		if (memory->device != device)
			return wrong("cuMemGetHandleForAddressRange", "memory of two devices"), -1;
		if (!physical[memory->physical - 1].capable)
			return wrong("cuMemGetHandleForAddressRange", "memory without gpuDirectRDMACapable"), -1;
		until = memory->base + memory->size < end ? memory->base + memory->size : end;
		list.items[count++] = (struct udmabuf_create_item){ .memfd = memory->memfd,
								    .offset = at - memory->base,
								    .size = until - at };
		at = until;
	}
	*code = OPERATING_SYSTEM;
	exports++;
	list.head = (struct udmabuf_create_list){ .flags = UDMABUF_FLAGS_CLOEXEC, .count = count };
	return ioctl(udmabuf, UDMABUF_CREATE_LIST, &list);
}

int cuMemGetHandleForAddressRange(void *handle, uintptr_t address, size_t size, int type,
				  unsigned long long flags)
{
	struct memory *memory = NULL;
	int fd, code = OPERATING_SYSTEM;

	BEGIN(cuMemGetHandleForAddressRange);
	NEEDS(cuMemGetHandleForAddressRange, handle && type == 1 && flags <= 1);
	NEEDS(cuMemGetHandleForAddressRange, size && address % PAGE == 0 && size % PAGE == 0);
	/* The range may begin in the block before a small allocation. */
	for (int i = 0; i < used_end; i++)
		if (all[i].kind != FREE && address - all[i].block < all[i].block_size)
			memory = &all[i];
	NEEDS(cuMemGetHandleForAddressRange, memory && memory->kind != HOST && memory->kind != MANAGED);
	NEEDS(cuMemGetHandleForAddressRange,
	      memory->physical || address + size <= memory->block + round_up(memory->block_size, PAGE));
	/* Memory of a pool and mapped memory are of no context. */
	if (!CURRENT || (memory->owner && !memory->physical && memory->kind != POOL ?
				 CURRENT != memory->owner :
				 CURRENT->device != memory->device))
		return INVALID_CONTEXT;
	if (flags && !pcie)
		return NOT_SUPPORTED;
	if (memory->kind == POOL && !pool_exports)
		return NOT_SUPPORTED;
	if (memory->kind == IMPORTED)
		return INVALID_VALUE;
	if (window && size > window)
		return OUT_OF_MEMORY;
	if (bare)
		fd = -1;
	else if (memory->physical)
		fd = across(address, size, &code);
	else
		fd = dmabuf(memory, address, size, UDMABUF_FLAGS_CLOEXEC);
	if (fd < 0 && !bare)
		return code;
	*(int *)handle = fd;
	return OK;
}
#endif

/* For the test: what the driver and its devices are like. */
void stub_set(const char *what, uintptr_t value)
{
	if (!strcmp(what, "pcie"))
		pcie = value;
	else if (!strcmp(what, "mig"))
		mig = value;
	else if (!strcmp(what, "spans"))
		spans = value;
	else if (!strcmp(what, "flush"))
		flushing = value;
	else if (!strcmp(what, "pools"))
		pool_exports = value;
	else if (!strcmp(what, "window"))
		window = value;
	else
		wrong("stub_set", what);
}

/* For the test: how often SYNC_MEMOPS was set for memory, and the flags of a primary context. */
unsigned int stub_synced(int device)
{
	return device < 0 ? (unsigned int)synced : primary[device].flags;
}

/* For the test: takes the flag of a primary context away again. */
void stub_unsync(int device)
{
	primary[device].flags = FLAGS;
}

/* For the test: a context of the application. */
void *stub_context(int device)
{
	initialised = 1;
	user[device].destroyed = 0;
	return &user[device];
}

/* For the test: destroys the context of the application, and its memory with it. */
void stub_destroy_context(int device)
{
	user[device].destroyed = 1;
	for (int i = 0; i < MOST; i++)
		if (all[i].kind != FREE && all[i].owner == &user[device])
			release(&all[i]);
}

#include "cuda_kinds.h"
