/* The part of libze_loader.so.1 that exporting memory needs: a driver without devices, and one with two. */
#include "stub.h"

enum { OK = 0, OUT_OF_HOST_MEMORY = 0x70000002, OUT_OF_DEVICE_MEMORY = 0x70000003, UNINITIALIZED = 0x78000001,
       UNSUPPORTED_FEATURE = 0x78000003, INVALID_ARGUMENT = 0x78000004, UNSUPPORTED_SIZE = 0x78000009 };
enum { CONTEXT_DESC = 0xd, QUEUE_DESC = 0xe, ALLOC_DESC = 0x15, ALLOC_PROPERTIES = 0x17, EXPORT_DESC = 0x18,
       EXPORT_FD = 0x1a, PCI_PROPERTIES = 0x10008, DMA_BUF = 2, SYNCHRONOUS = 1 };

struct desc {
	uint32_t stype;
	const struct desc *next;
	uint32_t flags, ordinal;
};

struct queue {
	uint32_t stype;
	const void *next;
	uint32_t ordinal, index, flags, mode, priority;
};

struct export {
	uint32_t stype;
	const void *next;
	uint32_t flags;
	int fd;
};

struct properties {
	uint32_t stype;
	struct export *next;
	uint32_t type;
	uint64_t id, page_size;
};

struct pci {
	uint32_t stype;
	void *next;
	uint32_t domain, bus, device, function;
	int32_t generation, width;
	int64_t bandwidth;
};

static char drivers[2], devices[2], contexts[8], lists[8];
static int initialised;

#define BEGIN(call)                                                                                \
	do {                                                                                       \
		int64_t code;                                                                      \
		if (refuses(#call, &code))                                                         \
			return code;                                                               \
		if (!initialised && strcmp(#call, "zeInit"))                                       \
			return UNINITIALIZED;                                                      \
	} while (0)
#define NEEDS(call, condition)                                                                     \
	do {                                                                                       \
		if (!(condition) && wrong(#call, #condition))                                      \
			return INVALID_ARGUMENT;                                                   \
	} while (0)
/* Whether a handle of a set is live. */
#define IS(set, handle)                                                                            \
	((char *)(handle) >= set && (char *)(handle) < set + sizeof(set) && *(char *)(handle))
#define DEVICE_NUMBER(device) ((int)((char *)(device) - devices))

static uint32_t list(char *set, uint32_t most, uint32_t *count, void **handles)
{
	if (handles)
		for (uint32_t i = 0; i < most && i < *count; i++) {
			set[i] = 1;
			handles[i] = &set[i];
		}
	*count = most;
	return OK;
}

static void *take(char *set, int size)
{
	for (int i = 0; i < size; i++)
		if (!set[i]) {
			set[i] = 1;
			live++;
			return &set[i];
		}
	return NULL;
}

uint32_t zeInit(uint32_t flags)
{
	BEGIN(zeInit);
	NEEDS(zeInit, flags == 0);
	initialised = 1;
	return OK;
}

uint32_t zeDriverGet(uint32_t *count, void **handles)
{
	BEGIN(zeDriverGet);
	return list(drivers, 2, count, handles);
}

uint32_t zeDeviceGet(void *driver, uint32_t *count, void **handles)
{
	BEGIN(zeDeviceGet);
	NEEDS(zeDeviceGet, IS(drivers, driver));
	return list(devices, driver == &drivers[0] ? 0 : 2, count, handles);
}

uint32_t zeDevicePciGetPropertiesExt(void *device, struct pci *pci)
{
	BEGIN(zeDevicePciGetPropertiesExt);
	NEEDS(zeDevicePciGetPropertiesExt, IS(devices, device) && pci->stype == PCI_PROPERTIES && !pci->next);
	pci->domain = DEVICE_NUMBER(device);
	pci->bus = 0x9a;
	pci->device = 2;
	pci->function = 0;
	return OK;
}

uint32_t zeContextCreate(void *driver, const struct desc *desc, void **context)
{
	BEGIN(zeContextCreate);
	NEEDS(zeContextCreate, driver == &drivers[1] && desc->stype == CONTEXT_DESC && !desc->next && !desc->flags);
	*context = take(contexts, sizeof(contexts));
	return *context ? OK : OUT_OF_HOST_MEMORY;
}

uint32_t zeContextDestroy(void *context)
{
	BEGIN(zeContextDestroy);
	NEEDS(zeContextDestroy, IS(contexts, context));
	for (int i = 0; i < MOST; i++)
		NEEDS(zeContextDestroy, all[i].kind == FREE || all[i].owner != context);
	*(char *)context = 0;
	live--;
	return OK;
}

uint32_t zeMemAllocDevice(void *context, const struct desc *desc, size_t size, size_t alignment, void *device,
			  void **address)
{
	struct memory *new;

	BEGIN(zeMemAllocDevice);
	NEEDS(zeMemAllocDevice, IS(contexts, context) && IS(devices, device) && size && address);
	NEEDS(zeMemAllocDevice, desc->stype == ALLOC_DESC && !desc->flags && !desc->ordinal);
	NEEDS(zeMemAllocDevice, alignment && !(alignment & (alignment - 1)));
	if (size > 1UL << 30)
		return UNSUPPORTED_SIZE;
	if (!(new = make(DEVICE, size, context, DEVICE_NUMBER(device))))
		return OUT_OF_DEVICE_MEMORY;
	if (desc->next) {
		NEEDS(zeMemAllocDevice, desc->next->stype == EXPORT_DESC && !desc->next->next);
		NEEDS(zeMemAllocDevice, desc->next->flags == DMA_BUF);
		new->exportable = 1;
	}
	*address = (void *)new->base;
	return OK;
}

uint32_t zeMemFree(void *context, void *address)
{
	struct memory *memory = find((uintptr_t)address);

	BEGIN(zeMemFree);
	NEEDS(zeMemFree, IS(contexts, context) && memory && memory->base == (uintptr_t)address);
	NEEDS(zeMemFree, memory->owner == context);
	release(memory);
	return OK;
}

uint32_t zeMemGetAllocProperties(void *context, const void *address, struct properties *found, void **device)
{
	struct memory *memory = find((uintptr_t)address);

	BEGIN(zeMemGetAllocProperties);
	NEEDS(zeMemGetAllocProperties, IS(contexts, context) && address && found->stype == ALLOC_PROPERTIES);
	lookups++;
	found->type = !memory ? 0 : memory->kind == HOST ? 1 : memory->kind == DEVICE ? 2 : 3;
	found->id = memory ? memory->id : 0;
	found->page_size = PAGE;
	if (device)
		*device = memory ? &devices[memory->device] : NULL;
	if (found->next) {
#ifdef OLD
		return UNSUPPORTED_FEATURE;
#else
		NEEDS(zeMemGetAllocProperties, found->next->stype == EXPORT_FD && !found->next->next);
		NEEDS(zeMemGetAllocProperties, found->next->flags == DMA_BUF && found->next->fd == -1);
		if (!memory || !memory->exportable)
			return UNSUPPORTED_FEATURE;
		if (bare)
			return OK;
		/* The same descriptor each time, closed with the allocation. */
		if (memory->fd < 0)
			memory->fd = dmabuf(memory, memory->block, memory->block_size, UDMABUF_FLAGS_CLOEXEC);
		if (memory->fd < 0)
			return OUT_OF_HOST_MEMORY;
		found->next->fd = memory->fd;
#endif
	}
	return OK;
}

#ifndef OLD
uint32_t zeMemGetAddressRange(void *context, const void *address, void **base, size_t *size)
{
	const struct memory *memory = find((uintptr_t)address);

	BEGIN(zeMemGetAddressRange);
	NEEDS(zeMemGetAddressRange, IS(contexts, context) && memory && base && size);
	*base = (void *)(nonsense == BASE_ABOVE ? (uintptr_t)address + PAGE : memory->base);
	*size = nonsense == SIZE_ZERO ? 0 : memory->size;
	return OK;
}
#endif

uint32_t zeCommandListCreateImmediate(void *context, void *device, const struct queue *desc, void **new)
{
	BEGIN(zeCommandListCreateImmediate);
	NEEDS(zeCommandListCreateImmediate, IS(contexts, context) && IS(devices, device));
	NEEDS(zeCommandListCreateImmediate, desc->stype == QUEUE_DESC && !desc->next && !desc->flags);
	NEEDS(zeCommandListCreateImmediate, desc->mode == SYNCHRONOUS && !desc->index);
	*new = take(lists, sizeof(lists));
	return *new ? OK : OUT_OF_HOST_MEMORY;
}

uint32_t zeCommandListAppendMemoryFill(void *commands, void *address, const void *pattern, size_t pattern_size,
				       size_t size, void *event, uint32_t count, void **events)
{
	struct memory *memory = find((uintptr_t)address);

	BEGIN(zeCommandListAppendMemoryFill);
	NEEDS(zeCommandListAppendMemoryFill, IS(lists, commands) && memory && pattern_size == 4 && size % 4 == 0);
	NEEDS(zeCommandListAppendMemoryFill, (uintptr_t)address + size <= memory->base + memory->size);
	NEEDS(zeCommandListAppendMemoryFill, !event && !count && !events);
	for (size_t i = 0; i < size; i += 4)
		memcpy((char *)address + i, pattern, 4);
	return OK;
}

uint32_t zeCommandListDestroy(void *commands)
{
	BEGIN(zeCommandListDestroy);
	NEEDS(zeCommandListDestroy, IS(lists, commands));
	*(char *)commands = 0;
	live--;
	return OK;
}

/* For the test: zeMemAllocShared, zeMemAllocHost, and memory that is not exportable. */
uintptr_t stub_other(int managed, size_t size)
{
	return make(managed ? MANAGED : HOST, size, NULL, 0)->base;
}

uintptr_t stub_plain(size_t size)
{
	return make(DEVICE, size, NULL, 0)->base;
}

void stub_free(uintptr_t address)
{
	release(find(address));
}

/* For the test: the first live context. */
void *stub_context(void)
{
	for (unsigned int i = 0; i < sizeof(contexts); i++)
		if (contexts[i])
			return &contexts[i];
	return NULL;
}
