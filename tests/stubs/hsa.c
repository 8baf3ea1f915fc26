/* The part of libhsa-runtime64.so.1 that exporting memory needs: a CPU (agent 1) and two GPUs (2, 3). */
#include <stdbool.h>

#include "stub.h"

enum { OK = 0, ERROR = 0x1000, INVALID_ARGUMENT = 0x1001, INVALID_ALLOCATION = 0x1003, INVALID_AGENT = 0x1004,
       OUT_OF_RESOURCES = 0x1008, NOT_INITIALIZED = 0x100b, RESOURCE_FREE = 0x100a };

#define POOL_SIZE (1UL << 30)

typedef struct {
	uint64_t handle;
} handle;

struct info {
	uint32_t size, type;
	void *agent_base, *host_base;
	size_t bytes;
	void *user;
	handle owner;
	uint32_t flags;
};

static int initialised, without_callbacks, without_hdp;
/* The register that flushes, which the library writes. */
static volatile uint32_t hdp[2];
static struct {
	void (*callback)(void *, void *);
	uintptr_t address;
} watches[MOST];

#define BEGIN(call)                                                                                \
	do {                                                                                       \
		int64_t code;                                                                      \
		if (refuses(#call, &code))                                                         \
			return code;                                                               \
		if (!initialised && strcmp(#call, "hsa_init"))                                     \
			return NOT_INITIALIZED;                                                    \
	} while (0)
#define NEEDS(call, condition)                                                                     \
	do {                                                                                       \
		if (!(condition) && wrong(#call, #condition))                                      \
			return INVALID_ARGUMENT;                                                   \
	} while (0)

int hsa_init(void)
{
	BEGIN(hsa_init);
	initialised++;
	live++;
	return OK;
}

int hsa_shut_down(void)
{
	BEGIN(hsa_shut_down);
	initialised--;
	live--;
	return OK;
}

int hsa_status_string(int code, const char **text)
{
	switch (code) {
	case ERROR: *text = "HSA_STATUS_ERROR: A generic error has occurred."; return OK;
	case OUT_OF_RESOURCES: *text = "HSA_STATUS_ERROR_OUT_OF_RESOURCES"; return OK;
	}
	return INVALID_ARGUMENT;
}

int hsa_iterate_agents(int (*visit)(handle, void *), void *data)
{
	BEGIN(hsa_iterate_agents);
	for (uint64_t agent = 1; agent <= 3; agent++) {
		int code = visit((handle){ agent }, data);

		if (code != OK)
			return code;
	}
	return OK;
}

int hsa_agent_get_info(handle agent, int attribute, void *value)
{
	uint32_t *word = value;

	BEGIN(hsa_agent_get_info);
	NEEDS(hsa_agent_get_info, agent.handle >= 1 && agent.handle <= 3);
	switch (attribute) {
	case 17: *word = agent.handle > 1; return OK;
	case 0xa00e:
		((const volatile void **)value)[0] = without_hdp ? NULL : &hdp[0];
		((const volatile void **)value)[1] = without_hdp ? NULL : &hdp[1];
		return OK;
	case 0xa006: *word = agent.handle << 8 | 5 << 3 | 1; return OK;
	case 0xa00f: *word = agent.handle == 3; return OK;
	}
	return wrong("hsa_agent_get_info", "unknown attribute"), INVALID_ARGUMENT;
}

/* Agent 2's pools: 20 allows no allocation, 21 is fine-grained, 22 is the GPU's memory. */
int hsa_amd_agent_iterate_memory_pools(handle agent, int (*visit)(handle, void *), void *data)
{
	BEGIN(hsa_amd_agent_iterate_memory_pools);
	for (uint64_t pool = 10 * agent.handle; pool < 10 * agent.handle + 3; pool++) {
		int code = visit((handle){ pool }, data);

		if (code != OK)
			return code;
	}
	return OK;
}

int hsa_amd_memory_pool_get_info(handle pool, int attribute, void *value)
{
	BEGIN(hsa_amd_memory_pool_get_info);
	NEEDS(hsa_amd_memory_pool_get_info, pool.handle % 10 < 3);
	switch (attribute) {
	case 0: *(uint32_t *)value = pool.handle % 10 ? 0 : 3; return OK;
	case 1: *(uint32_t *)value = pool.handle % 10 == 1 ? 2 : 4; return OK;
	case 2: *(size_t *)value = POOL_SIZE; return OK;
	case 5: *(bool *)value = pool.handle % 10 != 0; return OK;
	}
	return wrong("hsa_amd_memory_pool_get_info", "unknown attribute"), INVALID_ARGUMENT;
}

int hsa_amd_memory_pool_allocate(handle pool, size_t size, uint32_t flags, void **address)
{
	struct memory *new;

	BEGIN(hsa_amd_memory_pool_allocate);
	NEEDS(hsa_amd_memory_pool_allocate, size && address && flags == 0);
	NEEDS(hsa_amd_memory_pool_allocate, pool.handle % 10 == 2 && size % PAGE == 0);
	if (size > POOL_SIZE)
		return INVALID_ALLOCATION;
	if (!(new = make(DEVICE, size, NULL, pool.handle / 10)))
		return OUT_OF_RESOURCES;
	*address = (void *)new->base;
	return OK;
}

/* Calls back after the memory has no owner any more, and before its addresses can be used again. */
static void released(uintptr_t address)
{
	for (int i = 0; i < MOST; i++)
		if (watches[i].callback && watches[i].address == address) {
			void (*callback)(void *, void *) = watches[i].callback;

			watches[i].callback = NULL;
			callback((void *)address, NULL);
		}
}

int hsa_amd_memory_pool_free(void *address)
{
	struct memory *memory = find((uintptr_t)address);

	BEGIN(hsa_amd_memory_pool_free);
	NEEDS(hsa_amd_memory_pool_free, memory && memory->base == (uintptr_t)address);
	release(memory);
	released((uintptr_t)address);
	return OK;
}

int hsa_amd_register_deallocation_callback(void *address, void (*callback)(void *, void *), void *data)
{
	const struct memory *memory = find((uintptr_t)address);

	BEGIN(hsa_amd_register_deallocation_callback);
	NEEDS(hsa_amd_register_deallocation_callback, address && callback && !data);
	if (without_callbacks)
		return ERROR;
	if (!memory)
		return INVALID_ALLOCATION;
	for (int i = 0; i < MOST; i++)
		if (!watches[i].callback) {
			watches[i].callback = callback;
			watches[i].address = (uintptr_t)address;
			return OK;
		}
	return OUT_OF_RESOURCES;
}

int hsa_amd_memory_fill(void *address, uint32_t word, size_t count)
{
	struct memory *memory = find((uintptr_t)address);

	BEGIN(hsa_amd_memory_fill);
	NEEDS(hsa_amd_memory_fill, memory && (uintptr_t)address % 4 == 0);
	NEEDS(hsa_amd_memory_fill, (uintptr_t)address + 4 * count <= memory->base + memory->size);
	for (size_t i = 0; i < count; i++)
		((volatile uint32_t *)address)[i] = word;
	return OK;
}

int hsa_amd_pointer_info(const void *address, struct info *info, void *(*alloc)(size_t), uint32_t *count,
			 handle **agents)
{
	const struct memory *memory = find((uintptr_t)address);

	BEGIN(hsa_amd_pointer_info);
	NEEDS(hsa_amd_pointer_info, address && info && info->size == sizeof(*info));
	NEEDS(hsa_amd_pointer_info, !alloc && !count && !agents);
	lookups++;
	info->type = !memory			? 0 :
		     memory->kind == HOST	? 2 :
		     memory->kind == IMPORTED	? 4 :
		     memory->kind == RESERVED	? 6 :
						  1;
	if (memory) {
		info->agent_base = info->host_base =
			(void *)(nonsense == BASE_ABOVE ? (uintptr_t)address + PAGE : memory->base);
		info->bytes = nonsense == SIZE_ZERO ? 0 : memory->size;
		info->owner.handle = memory->device;
		info->flags = 4;
	}
	return OK;
}

#ifndef OLD
/* Exported descriptors that are not closed yet. */
static int out[64], outs;

/* The dma-buf covers the whole allocation. */
int hsa_amd_portable_export_dmabuf(const void *address, size_t size, int *fd, uint64_t *offset)
{
	const struct memory *memory = find((uintptr_t)address);

	BEGIN(hsa_amd_portable_export_dmabuf);
	NEEDS(hsa_amd_portable_export_dmabuf, address && size && fd && offset);
	/* Its own pools' memory only. */
	if (!memory || (uintptr_t)address + size > memory->base + memory->size || memory->kind == IMPORTED ||
	    memory->kind == RESERVED)
		return INVALID_ALLOCATION;
	if (memory->kind != DEVICE)
		return INVALID_AGENT;
	*fd = -1;
	if (bare)
		return OK;
	*fd = dmabuf(memory, memory->block, memory->block_size, 0);
	if (*fd < 0)
		return OUT_OF_RESOURCES;
	*offset = (uintptr_t)address - memory->base;
	out[outs++ % 64] = *fd;
	live++;
	return OK;
}

int hsa_amd_portable_close_dmabuf(int fd)
{
	BEGIN(hsa_amd_portable_close_dmabuf);
	for (int i = 0; i < 64; i++)
		if (fd > 0 && out[i] == fd) {
			out[i] = 0;
			live--;
			return close(fd) ? RESOURCE_FREE : OK;
		}
	return wrong("hsa_amd_portable_close_dmabuf", "the descriptor was not exported here"), RESOURCE_FREE;
}
#endif

/* For the test: locked host memory, memory of another process, memory mapped into reserved addresses, and
 * fine-grained memory of the host (hipHostMalloc) and of the GPU. */
uintptr_t stub_other(int kind, size_t size)
{
	static const enum kind kinds[] = { HOST, HOST, IMPORTED, RESERVED, DEVICE, DEVICE };

	return make(kinds[kind], size, NULL, kind < 2 || kind == 4 ? 1 : 2)->base;
}

void stub_free(uintptr_t address)
{
	release(find(address));
	released(address);
}

/* For the test: memory from its own pool, at an address of its choice. */
uintptr_t stub_allocate(size_t size)
{
	return make(DEVICE, size, NULL, 2)->base;
}

/* For the test: a runtime without deallocation callbacks, GPUs without HDP registers. */
void stub_set(const char *what, uintptr_t value)
{
	if (!strcmp(what, "callbacks"))
		without_callbacks = !value;
	else if (!strcmp(what, "hdp"))
		without_hdp = !value;
	else
		wrong("stub_set", what);
}

/* For the test: what was written to the register. */
uint32_t stub_hdp(void)
{
	return hdp[0];
}
