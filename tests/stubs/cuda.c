/* The part of libcuda.so.1 that exporting memory needs, with two GPUs. */
#include "stub.h"

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201,
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

/* The handle that was mapped, retained once more. */
int cuMemRetainAllocationHandle(unsigned long long *handle, void *address)
{
	const struct memory *memory = find((uintptr_t)address);

	BEGIN(cuMemRetainAllocationHandle);
	NEEDS(cuMemRetainAllocationHandle, handle);
	if (!memory || !memory->physical)
		return INVALID_VALUE;
	physical[memory->physical - 1].references++;
	live++;
	*handle = memory->physical;
	return OK;
}

static void drop_physical(int handle)
{
	struct physical *of = &physical[handle - 1];

	live--;
	if (!--of->references) {
		close(of->memfd);
		of->memfd = 0;
	}
}

int cuMemRelease(unsigned long long handle)
{
	BEGIN(cuMemRelease);
	NEEDS(cuMemRelease, handle > 0 && handle <= MOST && physical[handle - 1].references > 0);
	drop_physical(handle);
	return OK;
}

int cuMemGetAllocationPropertiesFromHandle(int *properties, unsigned long long handle)
{
	BEGIN(cuMemGetAllocationPropertiesFromHandle);
	NEEDS(cuMemGetAllocationPropertiesFromHandle,
	      handle > 0 && handle <= MOST && physical[handle - 1].references > 0);
	memset(properties, 0, 32);
	/* CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE. */
	properties[0] = properties[2] = 1;
	properties[3] = physical[handle - 1].device;
	((char *)properties)[25] = physical[handle - 1].capable;
	return OK;
}

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
	for (int i = 0; i < MOST; i++)
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

/* For the test: cuMemAddressReserve, whose BUFFER_ID all its mappings have, however often they change. That is the worst
 * that the documents allow. */
uintptr_t stub_reserve(size_t size)
{
	return reserve(size);
}

/* For the test: cuMemCreate. */
unsigned long long stub_create(size_t size, int device, int capable)
{
	for (int i = 0; i < MOST; i++)
		if (!physical[i].references) {
			int memfd = memfd_create("stub", MFD_CLOEXEC | MFD_ALLOW_SEALING);

			if (memfd < 0 || ftruncate(memfd, size) || fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK))
				return 0;
			physical[i] = (struct physical){ memfd, device, capable, 1, size };
			live++;
			return i + 1;
		}
	return 0;
}

/* For the test: cuMemMap and cuMemSetAccess. The mapping holds the memory. */
int stub_place(uintptr_t reservation, size_t reserved, uintptr_t address, unsigned long long handle)
{
	struct physical *of = &physical[handle - 1];
	struct memory *new = unused();

	initialised = 1;
	if (!new || mmap((void *)address, of->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, of->memfd, 0) ==
			    MAP_FAILED)
		return -1;
	*new = (struct memory){ .kind = DEVICE, .base = address, .size = of->size, .range = reservation,
				.range_size = reserved, .block = address, .block_size = of->size,
				.memfd = of->memfd, .id = reservation, .device = of->device, .fd = -1,
				.physical = handle };
	of->references++;
	live += 2;
	return 0;
}

/* For the test: cuMemUnmap of one mapping. */
void stub_remove(uintptr_t address)
{
	struct memory *memory = find(address);
	int handle = memory->physical;

	mmap((void *)memory->base, memory->size, PROT_NONE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	release(memory);
	drop_physical(handle);
}

/* Reservations of cuMemAddressReserve. */
static struct {
	uintptr_t base, size;
} reservations[MOST];

int cuMemGetAllocationGranularity(size_t *granularity, const int *properties, int option)
{
	BEGIN(cuMemGetAllocationGranularity);
	NEEDS(cuMemGetAllocationGranularity, granularity && properties[0] == 1 && option <= 1);
	*granularity = BLOCK;
	return OK;
}

int cuMemAddressReserve(uintptr_t *base, size_t size, size_t alignment, uintptr_t hint, unsigned long long flags)
{
	BEGIN(cuMemAddressReserve);
	NEEDS(cuMemAddressReserve, base && size && size % PAGE == 0 && !alignment && !hint && !flags);
	for (int i = 0; i < MOST; i++)
		if (!reservations[i].size) {
			reservations[i].base = *base = reserve(size);
			reservations[i].size = size;
			live++;
			return OK;
		}
	return OUT_OF_MEMORY;
}

int cuMemAddressFree(uintptr_t base, size_t size)
{
	BEGIN(cuMemAddressFree);
	NEEDS(cuMemAddressFree, !find(base));
	for (int i = 0; i < MOST; i++)
		if (reservations[i].base == base && reservations[i].size == size) {
			reservations[i].size = reservations[i].base = 0;
			live--;
			return OK;
		}
	return wrong("cuMemAddressFree", "it was not reserved"), INVALID_VALUE;
}

int cuMemCreate(unsigned long long *handle, size_t size, const int *properties, unsigned long long flags)
{
	BEGIN(cuMemCreate);
	/* CU_MEM_ALLOCATION_TYPE_PINNED, no handle type, CU_MEM_LOCATION_TYPE_DEVICE. */
	NEEDS(cuMemCreate, handle && size && size % BLOCK == 0 && !flags);
	NEEDS(cuMemCreate, properties[0] == 1 && !properties[1] && properties[2] == 1);
	NEEDS(cuMemCreate, properties[3] >= 0 && properties[3] < GPUS);
	*handle = stub_create(size, properties[3], ((const char *)properties)[25]);
	return *handle ? OK : OUT_OF_MEMORY;
}

int cuMemMap(uintptr_t address, size_t size, size_t offset, unsigned long long handle, unsigned long long flags)
{
	BEGIN(cuMemMap);
	NEEDS(cuMemMap, handle > 0 && handle <= MOST && physical[handle - 1].references > 0);
	NEEDS(cuMemMap, physical[handle - 1].size == size && !offset && !flags && !find(address));
	for (int i = 0; i < MOST; i++)
		if (address - reservations[i].base < reservations[i].size)
			return stub_place(reservations[i].base, reservations[i].size, address, handle) ?
				       OUT_OF_MEMORY :
				       OK;
	return wrong("cuMemMap", "the address is not reserved"), INVALID_VALUE;
}

int cuMemSetAccess(uintptr_t address, size_t size, const int *access, size_t count)
{
	BEGIN(cuMemSetAccess);
	NEEDS(cuMemSetAccess, find(address) && size && count == 1 && access[0] == 1 && access[2] == 3);
	return OK;
}

int cuMemUnmap(uintptr_t address, size_t size)
{
	const struct memory *memory = find(address);

	BEGIN(cuMemUnmap);
	NEEDS(cuMemUnmap, memory && memory->physical && memory->base == address && memory->size == size);
	stub_remove(address);
	return OK;
}

static int other(enum kind kind, uintptr_t *address, size_t size)
{
	struct memory *new;

	if (!CURRENT)
		return INVALID_CONTEXT;
	if (!(new = make(kind, size, CURRENT, CURRENT->device)))
		return OUT_OF_MEMORY;
	*address = new->base;
	return OK;
}

int cuMemAllocAsync(uintptr_t *address, size_t size, void *stream)
{
	BEGIN(cuMemAllocAsync);
	NEEDS(cuMemAllocAsync, address && size && !stream);
	return other(POOL, address, size);
}

int cuMemFreeAsync(uintptr_t address, void *stream)
{
	struct memory *memory = find(address);

	BEGIN(cuMemFreeAsync);
	NEEDS(cuMemFreeAsync, memory && memory->kind == POOL && memory->base == address && !stream);
	release(memory);
	return OK;
}

int cuMemAllocManaged(uintptr_t *address, size_t size, unsigned int flags)
{
	BEGIN(cuMemAllocManaged);
	NEEDS(cuMemAllocManaged, address && size && flags == 1);
	return other(MANAGED, address, size);
}

int cuMemAllocHost_v2(uintptr_t *address, size_t size)
{
	BEGIN(cuMemAllocHost);
	NEEDS(cuMemAllocHost, address && size);
	return other(HOST, address, size);
}

int cuMemFreeHost(uintptr_t address)
{
	struct memory *memory = find(address);

	BEGIN(cuMemFreeHost);
	NEEDS(cuMemFreeHost, memory && memory->kind == HOST && memory->base == address);
	release(memory);
	return OK;
}

/* For the test: `count` mappings of `size` bytes, back to back in a reservation with a hole after them. */
uintptr_t stub_map(int count, size_t size, int device)
{
	uintptr_t base = reserve((count + 1) * size);

	for (int i = 0; i < count; i++) {
		unsigned long long handle = stub_create(size, device, 1);

		if (!handle || stub_place(base, (count + 1) * size, base + i * size, handle))
			return 0;
		/* As applications do: the mapping holds the memory. */
		drop_physical(handle);
	}
	return base;
}

void stub_unmap(uintptr_t base)
{
	const struct memory *memory;

	while ((memory = find(base))) {
		uintptr_t size = memory->size;

		stub_remove(base);
		base += size;
	}
}

/* For the test: cuMemAllocManaged, cuMemAllocHost, cudaMallocAsync, and memory of cuIpcOpenMemHandle, which the driver
 * does not tell from memory of its own. */
uintptr_t stub_other(int kind, size_t size)
{
	static const enum kind kinds[] = { HOST, MANAGED, POOL, IMPORTED };

	return make(kinds[kind], size, &user[0], 0)->base;
}

void stub_free(uintptr_t address)
{
	release(find(address));
}
