/* CUDA: memory of pools, managed and host memory. Part of cuda.c. */

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
