# The kernel matrix' table from the guests' logs: a column for each kernel, in the order of the arguments, whose
# directories also hold `version`, `passed` and `result`.

function one_line(file, line) {
	line = "?"
	getline line < file
	close(file)
	return line
}

function row(title, values, line, k) {
	line = sprintf("%-42s", title)
	for (k = 1; k <= kernels; k++)
		line = line sprintf("%-24s", (k in values) ? values[k] : "-")
	sub(/ +$/, "", line)
	print line
}

function rows_of(names, count, cells, n, k, values) {
	for (n = 1; n <= count; n++) {
		delete values
		for (k = 1; k <= kernels; k++)
			if ((names[n], k) in cells)
				values[k] = cells[names[n], k]
		row("  " names[n], values)
	}
}

FNR == 1 {
	directory = FILENAME
	sub(/\/[^\/]*$/, "", directory)
	version[++kernels] = one_line(directory "/version")
	result[kernels] = one_line(directory "/result") ", " one_line(directory "/passed") " passed"
}

/^matrix: program / {
	if (!(($3, "seen") in cost)) {
		cost[$3, "seen"] = 1
		programs[++program_count] = $3
	}
	stack = $0
	sub(/^matrix: program [^ ]+ [0-9]+ /, "", stack)
	cost[$3, kernels] = $4 " / " stack
}

/^matrix: feature / {
	name = $0
	sub(/^matrix: feature [a-z]+ /, "", name)
	if (!((name, "seen") in has)) {
		has[name, "seen"] = 1
		features[++feature_count] = name
	}
	has[name, kernels] = $3
}

END {
	row("kernel", version)
	print "instructions verified / bytes of stack (of N functions: the largest; max: the deepest calls together)"
	rows_of(programs, program_count, cost)
	print "features"
	rows_of(features, feature_count, has)
	row("tests", result)
}
